"""The benchmarks run and say what they should; what they measure is no test."""

from cwac_lab.benchmarks import subspace


def test_every_way_of_the_subspace_is_measured_against_the_dense_one(capsys):
    sizes = {"width": 96, "out": 40, "tokens": 64, "rank": 4, "step-tokens": 16, "threads": 1, "repeats": 1}
    subspace.main([word for name, size in sizes.items() for word in (f"--{name}", str(size))])
    lines = capsys.readouterr().out.splitlines()
    assert "chosen by cost: randomized" in lines
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for line in lines if len(cells := line.split("|")) > 3}
    for way in subspace.WAYS:
        assert float(rows[way][-1]) > (0.999 if way != "randomized" else 0.9)
    assert rows["gram"][4] == f"{4 / 96:.2%}"
    assert rows["full SVD, dense projector"][4] == "100.00%"
    assert {f"{what}, k = {k}" for what in ("gradient", "weights") for k in (64, 128, 512)} < rows.keys()
