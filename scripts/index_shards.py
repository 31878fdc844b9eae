"""Write the index of WebDataset shards that exist; see `python scripts/index_shards.py --help`.

The same as `python -m fcmae.data.index_shards`, which an installed package has.
"""

import sys

from fcmae.data.index_shards import main

if __name__ == "__main__":
    sys.exit(main())
