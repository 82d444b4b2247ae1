"""``python -m gradaccum.cli``: the same as ``gradaccum``, for a checkout that is not installed."""

from gradaccum.cli import main

main()
