"""Pure functions on the tensors of one device.

Suffixes of names give shapes, one letter a dimension:

    T  tokens on this device            E  experts
    D  model dimension                  e  experts on this device
    F  hidden dimension of an expert    K  experts a token is sent to (top-k)
    S  rows received after dispatch (each token at most once per device)
    R  rows after expansion (one per token-expert pair held here, grouped by expert)
    N  rows of any matrix; I, O  input and output columns of a product

Data flows one way::

    x_TD -> route -> Routing -> dispatch -> (x_SD, Plan) -> experts_grouped_mm -> y_SD -> combine -> y_TD
"""
