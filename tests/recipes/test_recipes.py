from pathlib import Path
from tests.command import run_main
import time


def test_probe(light, tmp_path, capfd):
    for i in range(3):
        t = time.time()
        assert run_main("+recipe=distill", f"output_dir={tmp_path}/{i}", *light) == 0
        print(time.time() - t)
    import subprocess

    print(subprocess.run(["find", str(tmp_path / "1")], capture_output=True, text=True).stdout)
    out, err = capfd.readouterr()
    raise AssertionError(out + err)
