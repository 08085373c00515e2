import sys

from timm_eca.cli import main

sys.exit(main())
