import sys

from timm_eca.commands.main import main

sys.exit(main())
