"""Types that count as numbers: Python's and NumPy's."""

import numpy as np

INTEGER = (int, np.integer)
NUMBER = (int, float, np.number)
