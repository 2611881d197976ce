"""`python -m compile_attn`."""

from compile_attn.cli import main

raise SystemExit(main())
