"""One small function for each mistake in a call, with the text of its error.

Each message says what was expected, what came, and the likely repair.
"""

from bnjax.core.checks.inputs import feature_axes as feature_axes
from bnjax.core.checks.inputs import features as features
from bnjax.core.checks.inputs import floating as floating
from bnjax.core.checks.inputs import mask as mask
from bnjax.core.checks.inputs import output_dtype as output_dtype
from bnjax.core.checks.inputs import real_floating as real_floating
from bnjax.core.checks.inputs import several_values as several_values
from bnjax.core.checks.inputs import torch_input as torch_input
from bnjax.core.checks.settings import correction as correction
from bnjax.core.checks.settings import devices as devices
from bnjax.core.checks.settings import eps as eps
from bnjax.core.checks.settings import given as given
from bnjax.core.checks.settings import given_once as given_once
from bnjax.core.checks.settings import momentum as momentum
from bnjax.core.checks.settings import num_features as num_features
from bnjax.core.checks.settings import overriding_momentum as overriding_momentum
from bnjax.core.checks.settings import plausible_momentum as plausible_momentum
from bnjax.core.checks.settings import virtual_batch_size as virtual_batch_size
from bnjax.core.checks.settings import warn_once as warn_once
from bnjax.core.checks.trees import held as held
from bnjax.core.checks.trees import mutable_statistics as mutable_statistics
from bnjax.core.checks.trees import present as present
from bnjax.core.checks.trees import shapes as shapes
from bnjax.core.checks.trees import tree as tree
from bnjax.core.checks.trees import trees as trees
from bnjax.core.checks.trees import where as where
