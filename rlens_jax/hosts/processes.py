"""The processes of a run: they join, agree, and end together.

All communication uses JAX's coordination service, not the devices: it works before devices exist, waits for the slowest process,
and ends the others if a process is lost.
"""

import itertools
import json
import os
import re
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the client of the coordination service has no public name
from jax.experimental import multihost_utils

from rlens_jax.config import HostsConfig
from rlens_jax.console import BAD_INPUT, INTERRUPTED, RESUMABLE, STOPPED, StopRequested, mute, say
from rlens_jax.errors import UserError, printable
from rlens_jax.files import json_leaves
from rlens_jax.hosts.cluster import cluster_type, is_distributed, tpu_workers
from rlens_jax.hosts.supervisor import PORT_TAKEN, mark_joined
from rlens_jax.mirrors import address_of

T = TypeVar("T")

_DAY_MS = 24 * 60 * 60 * 1000
_STATUS = re.compile(r"[A-Z_]{6,}: ")
"""Start of an error message of XLA's runtime. A collective raises such an error if a process is lost."""


class AgreedError(UserError):
    """Bad input known to all processes: each ends with exit code 2, and process 0 prints the message."""


class Processes:
    """The `count` processes of a run, seen from the process `index` (from 0); process 0 `leads`: it prints and writes.

    All methods are collective: every process calls the same methods in the same order.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self.leads = index == 0
        self._rounds = itertools.count()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (any JSON value), in the order of the processes."""
        if self.count == 1:
            return [value]
        client, name = distributed.global_state.client, f"rlens_jax/{next(self._rounds)}"
        assert client is not None  # set by `joined`
        client.key_value_set(f"{name}/{self.index}", json.dumps(value))
        client.wait_at_barrier(name, _DAY_MS)
        values = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(f"{name}/")}
        return [values[index] for index in sorted(values)]

    def agreed(self, work: Callable[[], T]) -> T:
        """The result of `work` on this process, after it succeeded on all processes.

        Raises:
            AgreedError: on all processes, if `work` raised a UserError on any; names the process. A single process raises
                that UserError itself.
        """
        if self.count == 1:
            return work()
        error, result = None, None
        try:
            result = work()
        except UserError as raised:
            error = str(raised)
        errors = self.gather([error, socket.gethostname()])
        failed = [(index, text, host) for index, (text, host) in enumerate(errors) if text is not None]
        if not failed:
            return result  # type: ignore[return-value]  # set if there is no error
        index, text, host = failed[0]
        if len(failed) < self.count or len({text for _, text, _ in failed}) > 1:
            more = f" (and {len(failed) - 1} more processes failed)" if len(failed) > 1 else ""
            text = f"process {index} of {self.count}, host {host}: {text}{more}"
        raise AgreedError(text)

    def in_order(self, first: Callable[[], T], rest: Callable[[], T]) -> T:
        """The result of `first` on process 0; then the result of `rest` on all others. AgreedError as `agreed`."""
        result = self.agreed(lambda: first() if self.leads else None)
        others = self.agreed(lambda: None if self.leads else rest())
        return result if self.leads else others  # type: ignore[return-value]  # of the function that ran here

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise AgreedError, with each value that differs, unless all processes have the same facts (nested JSON values)."""
        by_process = self.gather(json_leaves(dict(facts)))
        different = []
        for name in dict.fromkeys(name for leaves in by_process for name in leaves):
            processes: dict[str, list[int]] = {}
            for index, leaves in enumerate(by_process):
                processes.setdefault(leaves.get(name, "not set"), []).append(index)
            if len(processes) > 1:
                different.append(f"{name} is " + ", ".join(f"{value} on {_listed(ids)}" for value, ids in processes.items()))
        if different:
            raise AgreedError(f"the processes of the run were started with different configurations: {'; '.join(different)}")

    def check_shared(self, folder: Path) -> None:
        """Check that all processes share the run's folder, with a temporary file that process 0 writes.

        Raises:
            AgreedError: process 0 cannot write the file, or others do not see it.
        """
        if self.count == 1:
            return
        if address_of(folder) is not None:  # a store is shared, and whoever may not read it says so
            return
        token: Path = folder / self.gather(f".shared-{secrets.token_hex(8)}")[0]
        self.agreed(lambda: _write_token(token) if self.leads else None)
        missing = [index for index, exists in enumerate(self.gather(token.exists())) if not exists]
        if self.leads:
            token.unlink()
        if missing:
            raise AgreedError(
                f"the output folder {folder} is not shared: {_listed(missing)} of {self.count} "
                f"{'does' if len(missing) == 1 else 'do'} not see the file that process 0 wrote; "
                "choose a folder on a file system that all hosts share, with --output"
            )


class Stopper:
    """Ends a run of several processes at the same step on all, after SIGTERM or a preemption notice on any."""

    def __init__(self) -> None:
        self._step = 0

    def check(self) -> None:
        """Count a step; every process calls this at the same steps. A call costs microseconds.

        A single process is ended by the signal itself instead, and so is each of several without JAX's preemption service.

        Raises:
            StopRequested: on all processes at the same step, soon after the signal.
        """
        self._step += 1
        if _tells_others() and multihost_utils.reached_preemption_sync_point(self._step):
            raise StopRequested


@contextmanager
def joined(hosts: HostsConfig) -> Iterator[Processes]:
    """Join the processes of the run. However the body ends, no process is left waiting for this one.

    A single process starts nothing and waits for nothing. With several, all but the first are muted, and
    - errors common to all (AgreedError, StopRequested) reach the caller on process 0, and end the others silently with the
      same exit code;
    - any other error belongs to this process. It is printed here, and the process ends at once, without JAX's shutdown, which
      would wait for the others. They end when its heartbeat stops.

    Raises:
        AgreedError: the processes have different numbers of processes in their configuration.
        UserError: JAX cannot join the processes, for example because the coordinator's port is in use.
    """
    if not is_distributed(hosts):
        yield Processes()
        return
    processes = _join(hosts)
    try:
        settings = {"num_processes": processes.count, "JAX's preemption service": _tells_others()}
        processes.check_same({"hosts": settings})
        if not _tells_others():
            say("JAX's preemption service is off: SIGTERM ends one process at once, and the others when its heartbeat stops")
        yield processes
    except (AgreedError, StopRequested) as end:
        if isinstance(end, StopRequested) and not _tells_others():
            _end_alone(f"\n{RESUMABLE}\n", STOPPED)
        if processes.leads:
            raise
        sys.exit(BAD_INPUT if isinstance(end, AgreedError) else STOPPED)
    except UserError as error:
        _end_alone(f"error: process {processes.index} of {processes.count}: {printable(str(error))}\n", BAD_INPUT)
    except KeyboardInterrupt:
        _end_alone(f"process {processes.index} of {processes.count} was interrupted\n", INTERRUPTED)
    except Exception as error:
        message = traceback.format_exc()
        if _STATUS.match(str(error)):
            # Usually another process is lost. Then JAX ends this one within the heartbeat, and its parent reports it.
            os.write(2, message.encode())
            time.sleep(hosts.heartbeat_seconds + 5)
        _end_alone(message, 1)


def _tells_others() -> bool:
    """Whether JAX tells all processes of a SIGTERM that one receives."""
    return distributed.global_state.preemption_sync_manager is not None


def _join(hosts: HostsConfig) -> Processes:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    configured = hosts.num_processes is not None
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.num_processes,
            hosts.process_id,
            cluster_detection_method="deactivate" if configured else cluster_type(os.environ, tpu_workers),
            initialization_timeout=hosts.wait_seconds,
            heartbeat_timeout_seconds=hosts.heartbeat_seconds,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if "Failed to start RPC server" in reason:
            raise UserError(PORT_TAKEN) from None
        raise UserError(
            f"JAX cannot join the processes of the run ({reason}); check hosts.coordinator, hosts.num_processes and "
            "hosts.process_id, or set them if the cluster's values are wrong"
        ) from None
    processes = Processes(distributed.global_state.process_id, distributed.global_state.num_processes)
    mark_joined(processes.index, processes.count)
    if not processes.leads:
        mute()
    return processes


def _end_alone(message: str, code: int) -> NoReturn:
    sys.stderr.write(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _write_token(token: Path) -> None:
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise UserError(f"cannot write to the run folder {token.parent}: {error.strerror}") from None


def _listed(indices: Sequence[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
