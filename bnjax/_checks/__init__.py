"""One small function for each mistake a user can make, with the text of its error.

Each message says what was expected, what came, and the likely repair.
"""

from bnjax._checks.inputs import feature_axes as feature_axes
from bnjax._checks.inputs import features as features
from bnjax._checks.inputs import mask as mask
from bnjax._checks.inputs import real_floating as real_floating
from bnjax._checks.inputs import several_values as several_values
from bnjax._checks.inputs import torch_input as torch_input
from bnjax._checks.settings import correction as correction
from bnjax._checks.settings import devices as devices
from bnjax._checks.settings import eps as eps
from bnjax._checks.settings import flax_momentum_is_plausible as flax_momentum_is_plausible
from bnjax._checks.settings import given as given
from bnjax._checks.settings import given_once as given_once
from bnjax._checks.settings import momentum as momentum
from bnjax._checks.settings import num_features as num_features
from bnjax._checks.settings import overriding_momentum as overriding_momentum
from bnjax._checks.settings import torch_momentum_is_plausible as torch_momentum_is_plausible
from bnjax._checks.settings import virtual_batch_size as virtual_batch_size
from bnjax._checks.tools import batch as batch
from bnjax._checks.tools import divides as divides
from bnjax._checks.tools import evaluating as evaluating
from bnjax._checks.tools import examples_mask as examples_mask
from bnjax._checks.tools import flax_model as flax_model
from bnjax._checks.tools import folded_variables as folded_variables
from bnjax._checks.tools import folder_of as folder_of
from bnjax._checks.tools import iterable_again as iterable_again
from bnjax._checks.tools import known_fields as known_fields
from bnjax._checks.tools import layer_has_fields as layer_has_fields
from bnjax._checks.tools import number_of_calls as number_of_calls
from bnjax._checks.tools import pattern_fits as pattern_fits
from bnjax._checks.tools import per_example as per_example
from bnjax._checks.tools import same_outputs as same_outputs
from bnjax._checks.tools import several_batches as several_batches
from bnjax._checks.tools import some_batch as some_batch
from bnjax._checks.tools import some_batch_norm as some_batch_norm
from bnjax._checks.tools import some_example as some_example
from bnjax._checks.tools import something_folded as something_folded
from bnjax._checks.variables import finite_statistics as finite_statistics
from bnjax._checks.variables import has_statistics as has_statistics
from bnjax._checks.variables import held as held
from bnjax._checks.variables import mutable_statistics as mutable_statistics
from bnjax._checks.variables import nnx_state as nnx_state
from bnjax._checks.variables import shapes as shapes
from bnjax._checks.variables import tree as tree
from bnjax._checks.variables import tree_fits as tree_fits
from bnjax._checks.variables import variables_fit as variables_fit
from bnjax._checks.variables import where as where
