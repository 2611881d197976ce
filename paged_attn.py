"""The package under the name that it is installed by: `import paged_attn` has all that `import compile_attn` has.

torch reads TORCH_LOGS while it is imported, and takes no other names than its own and those of modules that can be found. So
`TORCH_LOGS=paged_attn` needs a module of that name; see `compile_attn/logs.py`.
"""

from compile_attn import __all__ as __all__
from compile_attn import __getattr__ as __getattr__
