"""The sinks by name. None of their libraries is imported before a sink of it is checked or opened."""

from fastgrpo.run.logs import tensorboard_sink, trackio_sink, wandb_sink
from fastgrpo.run.logs.base import SinkKind
from fastgrpo.settings.schema import LogConfig

SINKS: dict[str, SinkKind] = {
    "tensorboard": tensorboard_sink.KIND,
    "wandb": wandb_sink.KIND,
    "trackio": trackio_sink.KIND,
}


def check_sinks(settings: LogConfig) -> None:
    """Raise ConfigError for a sink that is asked for and whose library or login is missing."""
    for name in settings.to:
        SINKS[name].check(settings)
