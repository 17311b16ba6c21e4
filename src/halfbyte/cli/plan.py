"""`halfbyte plan`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags

app = typer.Typer(add_completion=False)

_METHODS = "What to compare, as full,lora,qdora; by default full, lora, qlora and the config's own."
_DEVICE = "auto, cpu or cuda: here; or machines of the catalogue, as rtx-3060,a100-80g."
_PRICE = "What this machine costs, as '0.34 EUR/h'; other machines' prices are in the file of --machines."
_MACHINES = (
    "A YAML file of machines beside the catalogue; by default halfbyte/machines.yaml in the user's config folder."
)


@app.command()
@with_config_flags(leave_out=("report_to", "output_dir", "device"))
def plan(
    flags: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(help="A YAML config; flags win over it.")] = None,
    methods: Annotated[list[str] | None, typer.Option("--methods", help=_METHODS)] = None,
    device: Annotated[list[str] | None, typer.Option("--device", help=_DEVICE)] = None,
    price: Annotated[str | None, typer.Option("--price", help=_PRICE)] = None,
    deadline: Annotated[str | None, typer.Option("--deadline", help="When it must be done, as 90m, 6h or 2d.")] = None,
    pick: Annotated[
        str | None, typer.Option("--pick", metavar="cheapest|fastest", help="Choose one of the devices.")
    ] = None,
    machines: Annotated[Path | None, typer.Option("--machines", help=_MACHINES)] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="How good past predictions were on this machine.")
    ] = False,
    json: screen.JsonFlag = False,
) -> None:
    """Which methods fit, their memory, disk, time and cost, which one to use and why, or on which machine. Reads no
    weights.

    Example: halfbyte plan --model Qwen/Qwen3-0.6B --data rows.jsonl --memory 6GB
    """
    from halfbyte.cli import plan_screen
    from halfbyte.run.config import load_config
    from halfbyte.run.offer import offer, refuse

    if accuracy:
        from halfbyte.cli.accuracy import show
        from halfbyte.run.learning import accuracy_here

        found = accuracy_here()
        screen.print_json(found) if json else show(found)
        return
    answer = offer(
        load_config(config, flags),
        methods=methods or (),
        devices=device or (),
        price=price,
        deadline=deadline,
        pick=pick,
        machines=machines,
    )
    if json:
        screen.print_json(answer.as_dict())
    else:
        plan_screen.show(screen.console(), answer)
    refuse(answer)
