"""One small function for each mistake in a call, with the text of its error.

Each message says what was expected, what came, and the likely repair.
"""

from bnjax.core.checks.banks import (
    bank as bank,
)
from bnjax.core.checks.banks import (
    bank_by_name as bank_by_name,
)
from bnjax.core.checks.banks import (
    bank_is_there as bank_is_there,
)
from bnjax.core.checks.banks import (
    bank_names as bank_names,
)
from bnjax.core.checks.banks import (
    no_bank as no_bank,
)
from bnjax.core.checks.banks import (
    no_banks_yet as no_banks_yet,
)
from bnjax.core.checks.banks import (
    number_of_banks as number_of_banks,
)
from bnjax.core.checks.banks import (
    one_bank as one_bank,
)
from bnjax.core.checks.banks import (
    some_banks as some_banks,
)
from bnjax.core.checks.collections import (
    POOLED as POOLED,
)
from bnjax.core.checks.collections import (
    held as held,
)
from bnjax.core.checks.collections import (
    present as present,
)
from bnjax.core.checks.collections import (
    shapes as shapes,
)
from bnjax.core.checks.collections import (
    trees as trees,
)
from bnjax.core.checks.collections import (
    where as where,
)
from bnjax.core.checks.inputs import (
    affine_of_examples as affine_of_examples,
)
from bnjax.core.checks.inputs import (
    classes as classes,
)
from bnjax.core.checks.inputs import (
    feature_axes as feature_axes,
)
from bnjax.core.checks.inputs import (
    floating as floating,
)
from bnjax.core.checks.inputs import (
    mask as mask,
)
from bnjax.core.checks.inputs import (
    output_dtype as output_dtype,
)
from bnjax.core.checks.inputs import (
    several_values as several_values,
)
from bnjax.core.checks.inputs import (
    torch_input as torch_input,
)
from bnjax.core.checks.settings import (
    correction as correction,
)
from bnjax.core.checks.settings import (
    devices as devices,
)
from bnjax.core.checks.settings import (
    eps as eps,
)
from bnjax.core.checks.settings import (
    given as given,
)
from bnjax.core.checks.settings import (
    given_once as given_once,
)
from bnjax.core.checks.settings import (
    has_count as has_count,
)
from bnjax.core.checks.settings import (
    has_running as has_running,
)
from bnjax.core.checks.settings import (
    limit as limit,
)
from bnjax.core.checks.settings import (
    momentum as momentum,
)
from bnjax.core.checks.settings import (
    mutable_statistics as mutable_statistics,
)
from bnjax.core.checks.settings import (
    not_negative as not_negative,
)
from bnjax.core.checks.settings import (
    num_features as num_features,
)
from bnjax.core.checks.settings import (
    one_of as one_of,
)
from bnjax.core.checks.settings import (
    overriding_momentum as overriding_momentum,
)
from bnjax.core.checks.settings import (
    plausible_momentum as plausible_momentum,
)
from bnjax.core.checks.settings import (
    policy as policy,
)
from bnjax.core.checks.settings import (
    static as static,
)
from bnjax.core.checks.settings import (
    virtual_batch_size as virtual_batch_size,
)
from bnjax.core.checks.settings import (
    warn_once as warn_once,
)
from bnjax.core.checks.settings import (
    weight as weight,
)
