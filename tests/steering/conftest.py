from two_layer_model import greedy as greedy
from two_layer_model import language_model as language_model
