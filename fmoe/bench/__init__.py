"""``python -m fmoe bench``: what a layer costs here, beside what else there is."""
