"""Pages that show what was found, in HTML that stands alone; and pictures for a notebook."""

from interp_jax.report.attention_picture import attention_picture as attention_picture
from interp_jax.report.demo_report import DemoReport as DemoReport
from interp_jax.report.demo_report import DictionaryScore as DictionaryScore
from interp_jax.report.demo_report import LatentDashboard as LatentDashboard
from interp_jax.report.demo_report import LoopExample as LoopExample
from interp_jax.report.demo_report import Setting as Setting
from interp_jax.report.demo_report import SiteRow as SiteRow
from interp_jax.report.demo_report import Snippet as Snippet
from interp_jax.report.demo_report import SteeredText as SteeredText
from interp_jax.report.demo_report import SteeringSample as SteeringSample
from interp_jax.report.demo_report import TrainingCurve as TrainingCurve
from interp_jax.report.heat_map import effects_picture as effects_picture
from interp_jax.report.latents import choose_latents as choose_latents
from interp_jax.report.latents import latent_dashboards as latent_dashboards
from interp_jax.report.logit_lens_picture import logit_lens_picture as logit_lens_picture
from interp_jax.report.page import write_page as write_page
from interp_jax.report.picture import Picture as Picture
from interp_jax.report.pictures import frontier_picture as frontier_picture
from interp_jax.report.results import write_results as write_results
