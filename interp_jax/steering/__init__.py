"""Generation under an intervention, and directions that are added to a model's stream."""

from interp_jax.steering.generate import generate as generate
from interp_jax.steering.steer import Continuation as Continuation
from interp_jax.steering.steer import steer as steer
from interp_jax.steering.steering_vector import SteeringVector as SteeringVector
