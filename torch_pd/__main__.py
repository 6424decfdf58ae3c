"""``python -m torch_pd`` is ``torch-pd``."""

import sys

from torch_pd.cli import main

sys.exit(main())
