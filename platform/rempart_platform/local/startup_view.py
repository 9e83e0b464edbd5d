"""What `rempart up` shows of its processes on stderr: how far they have loaded, and what they log."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text


class StartupView:
    """Bars on a terminal; elsewhere nothing but logs. A context manager that shows while it is entered."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # it would fold what is there to be pasted
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> "StartupView":
        self._progress.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def expect(self, *names: str) -> None:
        """Shows these as starting."""
        for name in names:
            self._bars[name] = self._progress.add_task(f"{name}: starting", total=1.0)

    def loading(self, name: str, fraction: float) -> None:
        """Weights are loaded, up to 1."""
        what = "loading weights" if fraction < 1.0 else "warming up"
        self._progress.update(self._bars[name], completed=fraction, description=f"{name}: {what}")

    def ready(self, name: str) -> None:
        """Takes its bar away."""
        if (bar := self._bars.pop(name, None)) is not None:
            self._progress.remove_task(bar)

    def all_ready(self) -> None:
        """No more bars."""
        self._progress.stop()

    def log(self, name: str, line: str) -> None:
        """A line of a process's log, as it is."""
        self._console.print(Text.assemble((f"{name} | ", "dim"), line), soft_wrap=True)

    def say(self, text: str) -> None:
        """Something for the person at the console."""
        self._console.print(Text(text), soft_wrap=True)
