"""The names of timm that its underscore marks as private and that are needed all the same: the one place to mend."""

from timm.models._features import feature_take_indices
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from timm.models._input import get_model_input_config, update_model_args, update_model_input_size
from timm.models._manipulate import checkpoint, checkpoint_seq

__all__ = [
    "checkpoint",
    "checkpoint_seq",
    "feature_take_indices",
    "get_model_input_config",
    "load_model_config_from_path",
    "save_config_for_hf",
    "update_model_args",
    "update_model_input_size",
]
