"""DeepSeek-V2 and V3: a decoder with latent attention, experts in groups and shared experts.

Source: arXiv 2405.04434 and 2412.19437.

>>> import torch
>>> config = preset("debug")
>>> value, stats = loss(init(config, 0), *torch.randint(256, (2, 2, 16)), config)
>>> len(stats.layers)
3
"""

from .decoder import LayerParams as LayerParams  # all re-exported
from .decoder import LossStats as LossStats
from .decoder import ModelParams as ModelParams
from .decoder import flops_per_token as flops_per_token
from .decoder import forward as forward
from .decoder import init as init
from .decoder import loss as loss
from .decoder import num_params as num_params
from .decoder import preset as preset
from .decoder import specs as specs
from .decoder import update_biases as update_biases
from .families.deepseek import ROUTER as ROUTER
from .families.deepseek import DeepSeekV3Config as DeepSeekV3Config
