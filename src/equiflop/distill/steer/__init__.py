"""A student that starts from its teacher's own weights: found to be nearly mirrored, paired, and made exactly so."""

from equiflop.distill.steer.checks import check_steerable, check_tokens
from equiflop.distill.steer.involution import Stream, fit_stream
from equiflop.distill.steer.observe import Observations, observe
from equiflop.distill.steer.student import Steering, steer

__all__ = ["Observations", "Steering", "Stream", "check_steerable", "check_tokens", "fit_stream", "observe", "steer"]
