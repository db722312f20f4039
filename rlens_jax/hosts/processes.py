"""The processes of a run: how they join, agree, and end together.

Everything here goes through JAX's coordination service, not through the devices: it works before there are devices,
waits as long as the slowest process needs, and a process that is lost meanwhile ends the others.
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
from jax._src import distributed  # the service's client has no public name
from jax.experimental import multihost_utils

from rlens_jax.config import HostsConfig
from rlens_jax.console import BAD_INPUT, INTERRUPTED, STOPPED, StopRequested, mute
from rlens_jax.errors import UserError
from rlens_jax.files import json_leaves
from rlens_jax.hosts.cluster import detected, several, tpu_workers
from rlens_jax.hosts.supervisor import PORT_TAKEN, mark_joined

T = TypeVar("T")

_DAY_MS = 24 * 60 * 60 * 1000
_STATUS = re.compile(r"[A-Z_]{6,}: ")
"""How errors of XLA's runtime begin, one of which is what remains of a collective when a process is lost."""


class AgreedError(UserError):
    """Bad input that all processes know of: each ends with exit code 2, and process 0 says why."""


class Processes:
    """All processes of a run, seen from this one; a single process by default, which agrees with itself.

    All methods are collective: every process calls the same ones in the same order.

    Attributes:
        index: this process, from 0 on.
        count: how many there are.
        leads: whether this is process 0, which speaks and writes.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self.leads = index == 0
        self._rounds = itertools.count()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (anything that JSON knows), in the order of the processes."""
        if self.count == 1:
            return [value]
        client, name = distributed.global_state.client, f"rlens_jax/{next(self._rounds)}"
        assert client is not None  # `joined` made it
        client.key_value_set(f"{name}/{self.index}", json.dumps(value))
        client.wait_at_barrier(name, _DAY_MS)
        values = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(f"{name}/")}
        return [values[index] for index in sorted(values)]

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once it has succeeded on all processes.

        Raises:
            AgreedError: on all processes, when `work` raised a UserError on any; says on which.
            UserError: of a single process, as `work` raised it.
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
            return result  # type: ignore[return-value]  # there is one where there is no error
        index, text, host = failed[0]
        if len(failed) < self.count or len({text for _, text, _ in failed}) > 1:
            more = f" (and {len(failed) - 1} more of the processes cannot go on)" if len(failed) > 1 else ""
            text = f"process {index} of {self.count}, host {host}: {text}{more}"
        raise AgreedError(text)

    def in_order(self, first: Callable[[], T], rest: Callable[[], T]) -> T:
        """What `first` returns on process 0; after that, what `rest` returns on the others.

        Raises:
            AgreedError: as `agreed`.
        """
        result = self.agreed(first if self.leads else _nothing)
        others = self.agreed(_nothing if self.leads else rest)
        return result if self.leads else others  # type: ignore[return-value]  # not _nothing's

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Make sure that all processes work on the same.

        Args:
            facts: what must be the same everywhere, by name; nested, of JSON values.

        Raises:
            AgreedError: naming each fact that differs, with every process's value.
        """
        by_process = self.gather(json_leaves(dict(facts)))
        names = dict.fromkeys(name for values in by_process for name in values)
        different = []
        for name in names:
            values = [values.get(name, "not set") for values in by_process]
            if len(set(values)) > 1:
                told = (f"{value} on {_those(values, value)}" for value in dict.fromkeys(values))
                different.append(f"{name} is {', '.join(told)}")
        if different:
            raise AgreedError(
                f"the processes of the run were started with different configurations: {'; '.join(different)}"
            )

    def check_shared(self, folder: Path) -> None:
        """Make sure that all processes see the run's folder, by a file that process 0 writes there for a moment.

        Raises:
            AgreedError: the folder cannot be written, or is not the same on some process, naming it.
        """
        if self.count == 1:
            return
        token: Path = folder / self.gather(f".shared-{secrets.token_hex(8)}")[0]
        self.agreed(lambda: _write_token(token) if self.leads else None)
        blind = [index for index, sees in enumerate(self.gather(token.exists())) if not sees]
        if self.leads:
            token.unlink()
        if blind:
            raise AgreedError(
                f"the output folder {folder} is not shared: {_numbered(blind)} of {self.count} "
                f"{'does' if len(blind) == 1 else 'do'} not see what process 0 wrote there; "
                "name a folder on a file system that all hosts share, with --output"
            )


class Stopper:
    """Ends a run of several processes at the same point on all, after SIGTERM (or a preemption notice) on any."""

    def __init__(self) -> None:
        self._step = 0

    def check(self) -> None:
        """To be called on every process at the same points of its work, as often as is useful: it costs microseconds.

        A single process is not ended here but by the signal itself.

        Raises:
            StopRequested: on all processes at the same call, soon after the signal.
        """
        self._step += 1
        if multihost_utils.reached_preemption_sync_point(self._step):
            raise StopRequested


@contextmanager
def joined(hosts: HostsConfig) -> Iterator[Processes]:
    """The processes of the run, joined; however the body ends, no process is left waiting for this one.

    A single process is left alone: nothing is started, nothing waits. Of several, all but the first are muted, and
    - what all agree on (AgreedError, StopRequested) goes on to the caller on process 0, and ends the others with the
      same exit code, silently;
    - any other error is this process's own: it is told here, and the process ends at once, without JAX's shutdown,
      which would wait for the others; they end when its heartbeat stops.

    Raises:
        AgreedError: not all processes were told the same number of processes.
        UserError: JAX cannot join the processes, as when the coordinator's port is in use.
    """
    if not several(hosts):
        yield Processes()
        return
    processes = _join(hosts)
    try:
        processes.check_same({"hosts": {"num_processes": processes.count}})
        yield processes
    except (AgreedError, StopRequested) as end:
        if processes.leads:
            raise
        sys.exit(BAD_INPUT if isinstance(end, AgreedError) else STOPPED)
    except UserError as error:
        _end_alone(f"error: process {processes.index} of {processes.count}: {error}\n", BAD_INPUT)
    except KeyboardInterrupt:
        _end_alone(f"process {processes.index} of {processes.count} was interrupted\n", INTERRUPTED)
    except Exception as error:
        told = traceback.format_exc()
        if _STATUS.match(str(error)):
            # As a rule another process is lost; then JAX ends this one within the heartbeat, and its parent tells.
            os.write(2, told.encode())
            time.sleep(hosts.heartbeat_seconds + 5)
        _end_alone(told, 1)


def _join(hosts: HostsConfig) -> Processes:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    told = hosts.num_processes is not None
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.num_processes,
            hosts.process_id,
            cluster_detection_method="deactivate" if told else detected(os.environ, tpu_workers),
            initialization_timeout=hosts.wait_seconds,
            heartbeat_timeout_seconds=hosts.heartbeat_seconds,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if "Failed to start RPC server" in reason:
            raise UserError(PORT_TAKEN) from None
        raise UserError(
            f"JAX cannot join the processes of the run ({reason}); look at hosts.coordinator, hosts.num_processes and "
            "hosts.process_id, or set them where a cluster's are wrong"
        ) from None
    processes = Processes(distributed.global_state.process_id, distributed.global_state.num_processes)
    mark_joined(processes.index, processes.count)
    if not processes.leads:
        mute()
    return processes


def _end_alone(told: str, code: int) -> NoReturn:
    sys.stderr.write(told)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _write_token(token: Path) -> None:
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise UserError(f"cannot write to the run folder {token.parent}: {error.strerror}") from None


def _those(values: Sequence[str], value: str) -> str:
    return _numbered([index for index, other in enumerate(values) if other == value])


def _numbered(indices: Sequence[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _nothing() -> None:
    return None
