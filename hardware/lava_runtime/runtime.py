"""A Lava runtime in one interpreter: Lava's compiler, Lava's process models, no OS process."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from lava.magma.compiler.builders.channel_builder import ChannelBuilderMp
from lava.magma.compiler.builders.py_builder import PyProcessBuilder
from lava.magma.compiler.channels.interfaces import AbstractCspPort
from lava.magma.compiler.compiler import Compiler
from lava.magma.core.model.py.ports import AbstractPyPort
from lava.magma.core.process.ports.ports import create_port_id
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.run_conditions import RunSteps
from lava.magma.runtime.runtime_services.runtime_service import (
    AsyncPyRuntimeService,
    LoihiPyRuntimeService,
)
from scipy.sparse import csr_matrix

from hardware.errors import LavaDeadlockError, LavaModelError, LavaRuntimeError
from hardware.lava_runtime import housekeeping, values
from hardware.lava_runtime.channels import OUTSIDE, Channel, End, RecvPort, SendPort, shorten
from hardware.lava_runtime.tasks import (
    AsyncDomain,
    Domain,
    LoihiDomain,
    Scheduler,
    Service,
    Task,
    describe_waiting,
)

if TYPE_CHECKING:
    from lava.magma.compiler.executable import Executable
    from lava.magma.core.process.variable import Var
    from lava.magma.core.run_conditions import AbstractRunCondition
    from lava.magma.core.run_configs import RunConfig

_DOMAINS = {LoihiPyRuntimeService: LoihiDomain, AsyncPyRuntimeService: AsyncDomain}


class InProcessRuntime:
    """Runs the network of a Lava process in this interpreter, in this thread.

    The network is compiled by Lava's compiler and its genuine process models are built at once. The
    processes then belong to this runtime: `Var.get` and `Var.set`, `Monitor.get_data`,
    `process.run(condition)`, `process.wait`, `process.pause` and `process.stop` come here.

    Args:
        process: any process of the network.
        run_cfg: chooses process models, as for `process.run`.
        compile_config: options of Lava's compiler, as for `process.run`.
        executable: a network that is compiled already; takes the place of `run_cfg`. Lava compiles
            a process only once: to begin anew, give the `executable` of the first runtime.
        copy_parameters: give each model a copy of its `proc_params`, as Lava's own runtime does by
            forking. False saves the memory, if no model writes into them.

    Raises:
        LavaModelError: a process model cannot be constructed.
        LavaRuntimeError: a model is not written in Python, or its protocol is not Lava's.
    """

    def __init__(
        self,
        process: AbstractProcess,
        run_cfg: RunConfig | None = None,
        *,
        compile_config: dict[str, Any] | None = None,
        executable: Executable | None = None,
        copy_parameters: bool = True,
    ) -> None:
        self._scheduler = Scheduler(self._fail)
        self._tasks: dict[Any, Task] = {}
        self._variables: dict[int, tuple[Task, str]] = {}
        self._var_models: Mapping[int, Any] = {}
        self._state = "built"
        self.num_steps = 0
        with housekeeping.compilation() as made:
            executable = executable or _compiled(process, run_cfg, compile_config)
        housekeeping.forget([process, *made, *housekeeping.relatives(executable.process_list)])
        self.executable = executable
        try:
            self._build(executable, copy_parameters)
        except BaseException:
            self._release("failed")
            raise
        executable.assign_runtime_to_all_processes(self)
        process.runtime = self

    # --- running ----------------------------------------------------------------------------------

    def run(self, condition: AbstractRunCondition) -> None:
        """Run a number of time steps, from where the last run ended.

        With `RunSteps(n, blocking=False)` it comes back at once; the steps are taken while the
        caller waits: in `wait()`, or in an Extractor's `receive` and an Injector's `send`.

        Raises:
            LavaModelError: a process model raised; the runtime has ended.
            LavaDeadlockError: all processes wait for one another; the runtime has ended.
            LavaRuntimeError: it has ended before, is running already, or the condition is not
                RunSteps.
        """
        self._check_alive("run")
        if not isinstance(condition, RunSteps):
            raise LavaRuntimeError(
                f"{type(condition).__name__} needs a thread or process in the background, and this "
                "runtime has none; use RunSteps(num_steps), as often as you like"
            )
        if self.is_running:
            raise LavaRuntimeError("the network is running; wait(), pause() or stop() it first")
        if condition.num_steps < 0:
            raise LavaRuntimeError(f"RunSteps({condition.num_steps}): give 0 steps or more")
        self.num_steps = condition.num_steps
        self._scheduler.begin(condition.num_steps)
        if condition.blocking:
            self.wait()

    def start(self, condition: AbstractRunCondition) -> None:
        """The name that `AbstractProcess.run` calls: the same as `run`."""
        self.run(condition)

    def wait(self) -> None:
        """Take the steps of a run that was started with `blocking=False`. Raises as `run` does."""
        if self._state != "built":
            return
        self._scheduler.advance()
        if not self._scheduler.finished:
            raise self._deadlock()
        self._scheduler.end()
        if any(domain.stops for domain in self._scheduler.domains):
            self.stop()

    def pause(self) -> None:
        """End a run that was started with `blocking=False` after its current time step."""
        if self.is_running:
            self._scheduler.pause()
            self.wait()

    def stop(self) -> None:
        """End the runtime and let go of models and channels. Once is enough; more does no harm."""
        if self._state == "built":
            self._release("stopped")

    @property
    def is_running(self) -> bool:
        """A run that was started with `blocking=False` is not over."""
        return self._state == "built" and not self._scheduler.finished

    # What Lava's own code and tests ask a runtime.
    _is_initialized = _is_started = property(lambda self: self._state == "built")
    _is_running = is_running

    def __enter__(self) -> InProcessRuntime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # --- looking inside ---------------------------------------------------------------------------

    def model(self, process: AbstractProcess) -> Any:
        """The genuine process model of a process, for a debugger or a test.

        Raises:
            LavaRuntimeError: the process is not a leaf of this network, or the runtime has ended.
        """
        self._check_alive("look into")
        if process not in self._tasks:
            raise LavaRuntimeError(f"process {process.name} has no process model in this network")
        return self._tasks[process].model

    def get(self, var: Var) -> npt.NDArray | csr_matrix | str:
        """The value of a variable: a copy, in the model's own type. `Var.get` gives float64.

        Raises:
            LavaRuntimeError: the variable is not in this network, or the network is running.
        """
        task, name = self._variable(_aliased(var).id, var.name)
        return (
            copy.copy(np.asarray(v))
            if np.isscalar(v := getattr(task.model, name)) and (not isinstance(v, str))
            else copy.copy(v)
        )

    def set(self, var: Var, value: Any) -> None:
        """Set a variable.

        Raises:
            LavaRuntimeError: the variable is not in this network, the network is running, or the
                value has another number of elements.
        """
        _aliased(var).set(value)

    def get_var(self, var_id: int, idx: Any = None) -> npt.NDArray:
        """What `Var.get` calls: the value as Lava gives it, float64. Raises as `get` does."""
        task, name = self._variable(var_id)
        value = values.as_lava_gives_it(getattr(task.model, name), self._var_models[var_id].shape)
        return value if idx is None else value[idx]

    def set_var(self, var_id: int, value: Any, idx: Any = None) -> None:
        """What `Var.set` calls. Raises as `set` does."""
        task, name = self._variable(var_id)
        old = getattr(task.model, name)
        try:
            new = values.replaced(old, value, idx)
        except (ValueError, TypeError, IndexError) as error:
            raise LavaRuntimeError(f"variable {name} of {task.name}: {error}") from error
        setattr(task.model, name, new)
        task.model.on_var_update()

    def _variable(self, var_id: int, name: str = "") -> tuple[Task, str]:
        self._check_alive("look into")
        if self.is_running:
            raise LavaRuntimeError("the network is running; wait(), pause() or stop() it first")
        if var_id not in self._variables:
            raise LavaRuntimeError(
                f"variable {name or var_id} belongs to no process model of this network; the "
                "variable of a hierarchical process must be an alias of one that does"
            )
        return self._variables[var_id]

    # --- building ---------------------------------------------------------------------------------

    def _build(self, executable: Executable, copy_parameters: bool) -> None:
        builders = executable.proc_builders
        for process, builder in builders.items():
            if not isinstance(builder, PyProcessBuilder):
                raise LavaRuntimeError(
                    f"process {process.name} was compiled for other hardware "
                    f"({type(builder).__name__}); this runtime takes Python models only"
                )
            builder.csp_ports, builder._csp_port_map = {}, {}
            _refuse_channels_of_its_own(process, builder.proc_params)
        domains = self._domains(executable)
        channels = [self._connect(builders, builder) for builder in executable.channel_builders]
        self._connect_outside(builders)
        known = {id(process): process for process in builders}
        for process, builder in builders.items():
            task = Task(process, None, domains[builder._model_id])
            self._tasks[process] = task
            self._scheduler.tasks.append(task)
            task.domain.order.tasks.append(task)
            task.model = self._model(task, builder, known if copy_parameters else None)
            housekeeping.mend(task.model)
            for port in task.model.py_ports:
                shorten(port)
            task.model.service_to_process = task.model.process_to_service = Service(
                task, self._scheduler
            )
            for var_id, name in task.model.var_id_to_var_map.items():
                self._variables[var_id] = task, name
        self._var_models = executable.node_configs[0].var_models
        self._find_servers(channels)

    def _domains(self, executable: Executable) -> dict[int, Domain]:
        """The domain of each process model, by its id."""
        by_model: dict[int, Domain] = {}
        for builder in (executable.runtime_service_builders or {}).values():
            if builder.rs_class not in _DOMAINS:
                raise LavaRuntimeError(
                    f"{builder.rs_class.__name__} is not a protocol of this runtime; it knows "
                    "LoihiProtocol and AsyncProtocol on a CPU"
                )
            domain: Domain = _DOMAINS[builder.rs_class]()
            self._scheduler.domains.append(domain)
            by_model |= dict.fromkeys(builder._model_ids or [], domain)
        return by_model

    def _connect(self, builders: Mapping[Any, Any], builder: Any) -> Channel:
        if not isinstance(builder, ChannelBuilderMp):
            raise LavaRuntimeError(
                f"a channel of {type(builder).__name__} leads to other hardware; this runtime has "
                "channels between Python models only"
            )
        source, target = builder.src_port_initializer, builder.dst_port_initializer
        channel = Channel(
            End(builder.src_process.name, source.name),
            End(builder.dst_process.name, target.name),
            tuple(source.shape),
            _dtype(source.d_type),
            source.size,
        )
        send, receive = SendPort(channel, self._scheduler), RecvPort(channel, self._scheduler)
        builders[builder.src_process].set_csp_ports([send])
        builders[builder.dst_process].set_csp_ports([receive])
        builders[builder.dst_process].add_csp_port_mapping(
            create_port_id(builder.src_process.id, source.name), receive
        )
        return channel

    def _connect_outside(self, builders: Mapping[Any, Any]) -> None:
        """Channels between the network and the caller: Injector, Extractor."""
        for process, builder in builders.items():
            for name, initializer in builder.py_ports.items():
                port: Any = getattr(process, name)
                if not port.external_pipe_flag:
                    continue
                inside, outside = End(process.name, name), End(OUTSIDE, "")
                inward = name in process.in_ports.member_names
                channel = Channel(
                    *((outside, inside) if inward else (inside, outside)),
                    tuple(initializer.shape),
                    _dtype(initializer.d_type),
                    port.external_pipe_buffer_size,
                )
                send = SendPort(channel, self._scheduler)
                receive = RecvPort(channel, self._scheduler)
                builder.set_csp_ports([receive if inward else send])
                if inward:
                    port.external_pipe_csp_send_port = send
                else:
                    port.external_pipe_csp_recv_port = receive

    def _find_servers(self, channels: list[Channel]) -> None:
        waiting = {id(channel): channel for channel in channels}
        for task in self._tasks.values():
            for port in task.model.var_ports:
                for end in port.csp_ports:
                    if isinstance(end, RecvPort) and id(end.channel) in waiting:
                        end.channel.server = task, port

    def _model(
        self, task: Task, builder: PyProcessBuilder, shared: Mapping[int, Any] | None
    ) -> Any:
        """The process model; `shared`: what its copy of the parameters shares with the original."""
        parameters = builder.proc_params
        if shared is not None:
            builder.proc_params = _copied(parameters, shared)
        try:
            return builder.build()
        except Exception as error:  # whatever the constructor of a model raises
            raise _model_error(task, builder.proc_model, "construction", error) from error
        finally:
            builder.proc_params = parameters
            builder.csp_ports, builder._csp_port_map = {}, {}

    # --- ending -----------------------------------------------------------------------------------

    def _fail(self, task: Task | None, error: BaseException) -> BaseException:
        failure = error
        if task is not None and isinstance(error, Exception):
            failure = _model_error(task, type(task.model), task.domain.phase_name, error)
            failure.__cause__ = error
        self._release("failed")
        return failure

    def _deadlock(self) -> LavaDeadlockError:
        lines = describe_waiting(self._scheduler.waiting)
        step = max((task.time_step for task in self._scheduler.waiting), default=0)
        phases = {task.domain.phase_name for task in self._scheduler.waiting}
        self._release("failed")
        return LavaDeadlockError(
            f"deadlock at time step {step} ({', '.join(sorted(phases))}), no process can go on:\n  "
            + "\n  ".join(lines),
            lines,
        )

    def _release(self, state: str) -> None:
        self._state = state
        self._scheduler.end()
        for task in self._tasks.values():
            if task.model is not None:
                housekeeping.untie(task.model)
            task.model, task.handlers = None, {}
        self._tasks, self._variables, self._var_models = {}, {}, {}
        self._scheduler.tasks, self._scheduler.domains = [], []

    def _check_alive(self, what: str) -> None:
        if self._state != "built":
            raise LavaRuntimeError(
                f"cannot {what} a network whose runtime has {self._state}; make a new "
                "InProcessRuntime"
            )


@contextmanager
def in_process(copy_parameters: bool = True) -> Iterator[None]:
    """Inside, Lava's own `process.run(condition, run_cfg)` uses this runtime, in any script.

    Processes that have a runtime already keep it. Not for several threads at once.
    """
    original = AbstractProcess.create_runtime

    def create_runtime(
        self: AbstractProcess,
        run_cfg: RunConfig | None = None,
        executable: Executable | None = None,
        compile_config: dict[str, Any] | None = None,
    ) -> None:
        InProcessRuntime(
            self,
            run_cfg,
            executable=executable,
            compile_config=compile_config,
            copy_parameters=copy_parameters,
        )

    AbstractProcess.create_runtime = create_runtime
    try:
        yield
    finally:
        AbstractProcess.create_runtime = original


def _compiled(
    process: AbstractProcess, run_cfg: RunConfig | None, compile_config: dict[str, Any] | None
) -> Executable:
    if run_cfg is None:
        raise LavaRuntimeError(
            f"process {process.name} is not compiled: give a run_cfg, such as Loihi2SimCfg()"
        )
    return Compiler(compile_config).compile(process, run_cfg)


def _aliased(var: Var) -> Var:
    while var.aliased_var is not None:
        var = var.aliased_var
    return var


def _dtype(declared: Any) -> np.dtype:
    # LavaCDataType.INT32 is the number 4 (pypychannel.py).
    return np.dtype(np.int32 if declared == 4 else declared)


def _copied(parameters: Any, shared: Mapping[int, Any]) -> Any:
    """A copy of a model's parameters; what cannot be copied (an open file, a lock) is shared."""
    if parameters is None:
        return None
    result = copy.copy(parameters)
    result._parameters = {}
    for name, value in parameters._parameters.items():
        try:
            result._parameters[name] = copy.deepcopy(value, dict(shared))
        except Exception:  # whatever an object's own __deepcopy__ or __reduce__ raises
            result._parameters[name] = value
    return result


def _refuse_channels_of_its_own(process: AbstractProcess, parameters: Any) -> None:
    for value in parameters._parameters.values() if parameters is not None else ():
        if isinstance(value, AbstractCspPort):
            raise LavaRuntimeError(
                f"process {process.name} ({type(process).__name__}) brings a channel of its own, "
                "with shared memory and a thread; use a Monitor, an Extractor or Var.get instead"
            )


def _model_error(task: Task, model: type, phase: str, error: Exception) -> LavaModelError:
    port = _port_of(task.model, error.__traceback__)
    step = 0 if task.model is None else task.time_step
    where = f" at port {port}" if port else ""
    when = phase if phase == "construction" else f"time step {step}, {phase}"
    return LavaModelError(
        f"process {task.name} ({model.__name__}) failed in {when}{where}: "
        f"{type(error).__name__}: {error}",
        process=task.name,
        model=model.__name__,
        phase=phase,
        time_step=step,
        port=port,
    )


def _port_of(model: Any, trace: TracebackType | None) -> str | None:
    """The innermost port of the model that a traceback passes through."""
    ports = {id(port): name for name, port in vars(model or object).items() if _is_port(port)}
    found = None
    while trace is not None:
        holder = trace.tb_frame.f_locals.get("self")
        if isinstance(holder, SendPort | RecvPort):
            found = holder.name
        else:
            found = ports.get(id(holder), found)
        trace = trace.tb_next
    return found


def _is_port(value: Any) -> bool:
    return isinstance(value, AbstractPyPort)
