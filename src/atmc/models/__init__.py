"""The zoo of networks, and networks that a user's factory builds."""

from atmc.models.factory import USER_CODE_ERRORS, call_factory, import_factory
from atmc.models.normalize import Normalize
from atmc.models.zoo import NAMES, build, build_from_spec, conv_linear_weights

__all__ = [
    "NAMES",
    "USER_CODE_ERRORS",
    "Normalize",
    "build",
    "build_from_spec",
    "call_factory",
    "conv_linear_weights",
    "import_factory",
]
