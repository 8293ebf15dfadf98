"""Starts JAX for a run: on simulated devices, or as one of several processes that train together."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from examples.llama.devices.host_memory import keep_freed_memory

HEARTBEAT_SECONDS = 20
"""After this many seconds without a heartbeat a process counts as dead, and the others end."""

SHUTDOWN_SECONDS = 20
"""Seconds that a finished process waits for the others to finish."""

DEFAULT_MESH = "fsdp=*"
"""The default mesh of several processes."""


@dataclass(frozen=True)
class DeviceConfig:
    """The devices of this machine."""

    simulate_devices: int | None = None
    """Number of devices to simulate on this machine's CPU; with several processes, on each of them."""


@dataclass(frozen=True)
class ClusterConfig(DeviceConfig):
    """The identity of this process. Give all three numbers, `distributed=auto`, or none for one process."""

    coordinator: str | None = None
    """Host and port of process 0, HOST:PORT, the same for all processes."""
    processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""
    distributed: Literal["auto"] | None = None
    """Take the three values from the cluster: SLURM, Open MPI, Kubernetes or a TPU pod."""


Config = TypeVar("Config", bound=DeviceConfig)


def start_devices(config: Config) -> Config:
    """Starts the devices that a configuration asks for; call it before JAX computes anything.

    Freed memory stays with the process (`host_memory`).

    Returns:
        The configuration; several processes get a default mesh if none is given.

    Raises:
        ValueError: The options contradict each other, it is too late, or the cluster was not found.
        RuntimeError: The other processes were not found in time.
    """
    keep_freed_memory()
    cluster = config if isinstance(config, ClusterConfig) else ClusterConfig()
    several = _check(cluster)
    if config.simulate_devices is not None:
        simulate_devices(config.simulate_devices)
    if several:
        connect(cluster.coordinator, cluster.processes, cluster.process_id)
    if config.simulate_devices is not None and jax.default_backend() != "cpu":
        raise ValueError(
            f"simulate_devices is for the CPU, JAX runs on {jax.default_backend()}; "
            "set JAX_PLATFORMS=cpu or leave it out"
        )
    if jax.process_count() > 1 and getattr(config, "mesh", "") is None:
        config = dataclasses.replace(config, **{"mesh": DEFAULT_MESH})
    return config


def simulate_devices(count: int) -> None:
    """Makes the CPU count as several devices.

    Each device gets two of XLA's threads, however few cores there are (`PJRT_NPROC`, unless it is set). A
    collective blocks a thread until every device has reached it, and with fewer threads than devices, the
    default on a small machine, none may be left for the last ones.

    Raises:
        ValueError: The count is not positive, or JAX has begun with another one.
    """
    if count < 1:
        raise ValueError(f"simulate_devices must be at least 1, got {count}")
    os.environ.setdefault("PJRT_NPROC", str(max(2 * count, os.cpu_count() or 1)))
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # JAX has begun
        if jax.local_device_count("cpu") != count:
            raise ValueError(
                f"simulate_devices={count} comes too late, JAX has begun with "
                f"{jax.local_device_count('cpu')} CPU devices; call "
                "examples.llama.devices.processes.start_devices before anything else"
            ) from error


def connect(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; without arguments the cluster identifies them.

    Raises:
        ValueError: No cluster was found.
        RuntimeError: The others did not come in time.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"no cluster was found ({error}); give --coordinator HOST:PORT --processes N --process-id I"
        ) from error


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return jax.process_index() == 0


def agree(error: Exception | None, what: str = "") -> None:
    """Continues all processes or none, so that a process that cannot start does not leave the others waiting.

    Args:
        error: The reason why this process cannot continue, or None.
        what: Text that must be the same in all processes: settings and data.

    Raises:
        Exception: `error`, if given.
        ValueError: Another process cannot continue, or has another text.
    """
    if jax.process_count() > 1:
        digest = np.frombuffer(hashlib.sha256(what.encode()).digest(), np.uint32)
        mine = np.concatenate([[np.uint32(error is not None)], digest])
        everyone = np.asarray(multihost_utils.process_allgather(mine))
        failed = np.flatnonzero(everyone[:, 0])
        others = np.flatnonzero((everyone[:, 1:] != everyone[0, 1:]).any(axis=1))
        if error is None and failed.size:
            raise ValueError(f"process {failed[0]} could not start; its own output says why")
        if error is None and others.size:
            raise ValueError(
                f"process {others[0]} has other settings or other data than process 0; start all "
                "with the same options, data, tokenizer and versions"
            )
    if error is not None:
        raise error


def finish() -> None:
    """Waits until all processes are done, so that none mistakes another's end for its death."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("finished")


def abort() -> NoReturn:
    """Ends this process at once because of the current exception.

    An ordinary exit waits for the others, which may be waiting for this process.
    """
    traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def share_of_batch(sharding: Sharding, rows: int) -> tuple[int, int]:
    """The share of a batch that this process reads, as `process_index` and `process_count` for the data.

    Processes whose devices hold the same sequences (they split tensors between them) read the same share.

    Args:
        sharding: The sharding of the batch, with sequences on its first axis.
        rows: Number of sequences.

    Raises:
        ValueError: The processes' sequences overlap without being the same.
    """
    rows_of: dict[int, frozenset[int]] = {}
    for device, index in sharding.devices_indices_map((rows, 1)).items():
        here = rows_of.get(device.process_index, frozenset())
        rows_of[device.process_index] = here | frozenset(range(rows)[index[0]])
    shares = sorted(set(rows_of.values()), key=min)
    if sum(map(len, shares)) != rows or len({len(share) for share in shares}) != 1:
        raise ValueError(
            "the mesh gives processes sequences that overlap; let data x fsdp be a multiple, or a "
            f"divisor, of the {len(rows_of)} processes"
        )
    return shares.index(rows_of[jax.process_index()]), len(shares)


def describe() -> dict[str, Any]:
    """The processes of a run, as JSON."""
    return {"processes": jax.process_count(), "devices_of_each": jax.local_device_count()}


def _check(config: ClusterConfig) -> bool:
    """Whether there are several processes.

    Raises:
        ValueError: The options do not go together.
    """
    numbers = (config.coordinator, config.processes, config.process_id)
    given = [number is not None for number in numbers]
    if config.distributed is not None and any(given):
        raise ValueError("give distributed=auto or coordinator, processes and process_id, not both")
    if any(given) and not all(given):
        raise ValueError("coordinator, processes and process_id go together; give all three")
    if config.processes is not None and config.process_id is not None:
        if config.processes < 1 or not 0 <= config.process_id < config.processes:
            raise ValueError(
                f"process_id must be in 0..{config.processes - 1}, got {config.process_id}"
            )
        host, _, port = (config.coordinator or "").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"coordinator must be HOST:PORT, got {config.coordinator!r}")
    return config.distributed is not None or all(given)
