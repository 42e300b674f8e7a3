"""Free memory, by files as Linux writes them."""

from pathlib import Path

from qjax import host_memory


def test_of_a_machine_and_of_a_container(tmp_path: Path) -> None:
    assert host_memory.available(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8192 kB\n")
    assert host_memory.available(tmp_path) == 8192 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert host_memory.available(tmp_path) == 8192 * 1024
    (group / "memory.max").write_text("5000\n")
    assert host_memory.available(tmp_path) == 4000
    (group / "memory.stat").write_text("anon 300\ninactive_file 600\nactive_file 100\n")
    assert host_memory.available(tmp_path) == 4600


def test_of_a_container_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 8192 kB\n")
    group = tmp_path / "sys/fs/cgroup/memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("5000\n")
    (group / "memory.usage_in_bytes").write_text("9000\n")
    assert host_memory.available(tmp_path) == 0


def test_of_this_machine() -> None:
    free = host_memory.available()
    assert free is None or 1 << 20 < free < 1 << 50
