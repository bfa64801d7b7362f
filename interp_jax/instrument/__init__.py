"""Sites, the running pass, harvest: reading and changing a forward pass of any JAX function."""

from interp_jax.instrument.fetch import SiteValues as SiteValues
from interp_jax.instrument.fetch import fetch as fetch
from interp_jax.instrument.gradients import gradients as gradients
from interp_jax.instrument.harvest import ReapError as ReapError
from interp_jax.instrument.harvest import call_and_reap as call_and_reap
from interp_jax.instrument.harvest import sow as sow
from interp_jax.instrument.inject import inject as inject
from interp_jax.instrument.layer_scan import in_layer as in_layer
from interp_jax.instrument.layer_scan import layer_scan as layer_scan
from interp_jax.instrument.list_sites import SiteInfo as SiteInfo
from interp_jax.instrument.list_sites import SiteTable as SiteTable
from interp_jax.instrument.list_sites import list_sites as list_sites
from interp_jax.instrument.loop_value import LoopValueError as LoopValueError
from interp_jax.instrument.module_sites import module_sites as module_sites
from interp_jax.instrument.running_pass import Activation as Activation
from interp_jax.instrument.running_pass import RunningPass as RunningPass
from interp_jax.instrument.running_pass import SiteError as SiteError
from interp_jax.instrument.running_pass import iterate as iterate
from interp_jax.instrument.running_pass import site as site
