"""What counts as a number: Python's own, and NumPy's."""

import numpy as np

INTEGER = (int, np.integer)
NUMBER = (int, float, np.number)
