"""What each recipe takes until the `shapes` experiment has its result; hours, so only where --recipes names a folder.

    python -m pytest bench -k time_to_result --recipes runs/recipes --seeds 1 2 3 4 5 --split test

Finished runs are not repeated. Settings are chosen by the split `development` alone.
"""

import pytest
from measure import RecordedClock
from pytest_benchmark.fixture import BenchmarkFixture
from time_to_result import EVALUATED, RECIPES, Spent, read_spent, table

from fastgrpo.shapes_lab.study import run_folder, train_all

CLOCK = RecordedClock()


@pytest.fixture(scope="module")
def found(pytestconfig: pytest.Config) -> dict[str, list[Spent | None]]:
    """What every seed's run of each recipe took, also in FOLDER/SPLIT/table.md."""
    folder, split = pytestconfig.getoption("--recipes"), pytestconfig.getoption("--split")
    if folder is None:
        pytest.skip("it takes hours: say where its runs go, with --recipes FOLDER")
    seeds, folder = pytestconfig.getoption("--seeds"), folder / split
    codes = train_all({name: (*EVALUATED, *flags) for name, flags in RECIPES.items()}, seeds, folder, split)
    assert not any(codes), f"a training failed; its log is in {folder}"
    taken = {name: [read_spent(run_folder(folder, name, seed)) for seed in seeds] for name in RECIPES}
    lines = table(taken)
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("", *lines, sep="\n")
    return taken


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", RECIPES)
def test_time_to_result(name: str, found: dict[str, list[Spent | None]], benchmark: BenchmarkFixture) -> None:
    """Seconds of training."""
    benchmark.group = "time to result"
    there = [spent.seconds for spent in found[name] if spent]
    if not there:
        pytest.skip("no run of it has reached the result")
    CLOCK.replay(benchmark, there)
