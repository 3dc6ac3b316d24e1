"""The compiled helper of dockerd.py, which never needs it: `make native` builds it, `lib` has its functions.

Each has a twin in Python inside dockerd.py, and the tests run with both."""
from ._helper import ffi, lib

__all__ = ["ffi", "lib"]
