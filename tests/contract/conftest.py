import pytest

pytest.register_assert_rewrite("fastckpt.testing.store_contract")
