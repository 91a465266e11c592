"""The names of timm that its underscore marks as private and that are needed all the same: the one place to mend."""

from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from timm.models._manipulate import checkpoint, checkpoint_seq

__all__ = ["checkpoint", "checkpoint_seq", "feature_take_indices", "update_model_args", "update_model_input_size"]
