import pytest
import tiny


@pytest.fixture(scope="package")
def sdxl_folder(tmp_path_factory):
    return tiny.save_sdxl(tmp_path_factory.mktemp("sdxl") / "xl")
