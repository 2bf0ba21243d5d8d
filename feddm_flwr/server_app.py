"""The server's side of the Flower app; what a run does is told in `server.run`."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Does one run, from the run config to the report."""
    # Flower starts a simulation's nodes only once this module is imported: torch must not be among its imports.
    from feddm_flwr.server import run

    run.main(grid, context)
