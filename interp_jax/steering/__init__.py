"""Making a model say things differently by adding to its activations, reading what was added, and what it costs."""

from interp_jax.steering.as_intervention import as_intervention as as_intervention
from interp_jax.steering.contrast import from_pair as from_pair
from interp_jax.steering.contrast import mean_difference as mean_difference
from interp_jax.steering.contrast import principal_component as principal_component
from interp_jax.steering.decomposition import Decomposition as Decomposition
from interp_jax.steering.decomposition import decompose as decompose
from interp_jax.steering.decomposition import from_latents as from_latents
from interp_jax.steering.decomposition import latent_difference as latent_difference
from interp_jax.steering.edits import Edit as Edit
from interp_jax.steering.edits import add_vector as add_vector
from interp_jax.steering.edits import clamp_latents as clamp_latents
from interp_jax.steering.edits import steered_forward as steered_forward
from interp_jax.steering.frontier import FrontierPoint as FrontierPoint
from interp_jax.steering.frontier import frontier as frontier
from interp_jax.steering.positions import Positions as Positions
from interp_jax.steering.reading_vector import ReadVector as ReadVector
from interp_jax.steering.reading_vector import latent_densities as latent_densities
from interp_jax.steering.reading_vector import read_vector as read_vector
from interp_jax.steering.rollouts import Rollouts as Rollouts
from interp_jax.steering.rollouts import roll_out as roll_out
from interp_jax.steering.steer import Continuation as Continuation
from interp_jax.steering.steer import steer as steer
from interp_jax.steering.steered_losses import steered_losses as steered_losses
from interp_jax.steering.steering_vector import SteeringVector as SteeringVector
from interp_jax.steering.vocabulary import Vocabulary as Vocabulary
