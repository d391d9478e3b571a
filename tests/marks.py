"""What tests share in naming their cases."""

import functools

import pytest

another = functools.partial(pytest.param, marks=pytest.mark.on_one_backend)  # case of what runs on every backend
