"""The GPU's watch: which errors end a machine's use, what of nvidia-smi is believed, and that the group hears of it."""

import pytest

from server.host.agent import GpuReport
from server.host.gpu import GpuWatch
from tests.server.host.test_agent import machine  # noqa: F401 - a fixture

XID = "4,1021,88,-;NVRM: Xid (PCI:0000:31:00): {code}, pid=1234, name=python\n"


@pytest.mark.parametrize(("code", "fatal"), [(79, True), (48, True), (95, True), (13, False), (31, False), (45, False)])
def test_xids_of_the_hardware_are_fatal_those_of_a_program_are_not(code, fatal, tmp_path):
    log = tmp_path / "kmsg"
    log.write_text("6,1,2,-;usb 1-1: new device\n" + XID.format(code=code))
    watch = GpuWatch(kernel_log=log, nvidia_smi=["true"])
    found = watch.errors()
    assert bool(found) == fatal and all(f"Xid {code}" in error and "0000:31" in error for error in found)
    assert watch.errors() == []  # each is said once
    with log.open("a") as more:
        more.write(XID.format(code=79))
    assert len(watch.errors()) == 1
    watch.close()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo '0, 0, No'", []),
        ("echo '0, [N/A], [N/A]'", []),
        ("printf '0, 0, No\\n1, 3, No\\n'", ["GPU 1: 3 uncorrected"]),
        ("echo '0, 0, Yes'", ["GPU 0: row remapping failed"]),
    ],
)
def test_what_nvidia_smi_says(script, words, tmp_path):
    found = GpuWatch(kernel_log=tmp_path / "none", nvidia_smi=["sh", "-c", script]).errors()
    assert len(found) == len(words) and all(word in error for word, error in zip(words, found, strict=True))


def test_one_call_of_nvidia_smi_that_fails_is_not_yet_an_error(tmp_path):
    """A driver that is busy for a moment; what fails and what hangs count together, and one good answer begins anew."""
    answers = tmp_path / "answers"
    script = f"""read -r line <{answers}; sed -i 1d {answers}; eval "$line\""""
    watch = GpuWatch(kernel_log=tmp_path / "none", nvidia_smi=["bash", "-c", script], timeout_s=2)
    bad, hangs, good = "echo 'Unable to determine the device handle for GPU0' >&2; exit 9", "exec sleep 60", "echo '0, 0, No'"
    answers.write_text("\n".join([bad, bad, good, bad, hangs, bad, bad]) + "\n")
    found = []
    for _ in range(7):
        found.append(watch.errors())
        if watch._stuck:
            watch._stuck.wait(10)  # half a minute passes
    assert found[:5] == [[]] * 5 and all("failed (9): Unable to determine" in errors[0] for errors in found[5:])


def test_a_machine_without_a_driver_is_left_alone(tmp_path):
    assert GpuWatch(kernel_log=tmp_path / "none", nvidia_smi=["no-such-program"]).errors() == []


def test_a_gpu_error_makes_the_instance_unhealthy(machine, tmp_path):  # noqa: F811
    report = GpuReport(GpuWatch(kernel_log=tmp_path / "none", nvidia_smi=["sh", "-c", "echo '0, 2, No'"]), machine.group)
    report.step()
    assert machine.health == "Unhealthy"
    assert machine.cloudwatch.list_metrics(Namespace="Manylora", MetricName="GpuErrors")["Metrics"]
