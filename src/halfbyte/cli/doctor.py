"""`halfbyte doctor`"""

from typing import Annotated

import typer

from halfbyte.cli import screen

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again instead of using the cache.")] = False,
    json: screen.JsonFlag = False,
) -> None:
    """What this machine is and can do: devices, memory, instruction sets, measured rates, backend and why.

    Example: halfbyte doctor
    """
    from halfbyte.plan.doctor import diagnose

    facts = diagnose(refresh)
    if json:
        screen.print_json(facts)
        return
    hardware, rates = facts["hardware"], facts["rates"]
    gemm = ", ".join(f"{name} {screen.rate(value, 'FLOP')}" for name, value in rates["gemm"].items())
    rows = [
        ("halfbyte", f"{facts['halfbyte']}, torch {facts['packages']['torch']}, {hardware['system']}"),
        ("processor", f"{hardware['processor']}, {hardware['cores']} cores, {facts['threads']} threads"),
        ("instruction sets", ", ".join(hardware["instruction_sets"]) or "none that kernels use"),
        *((f"GPU {g['index']}", f"{g['name']}, {screen.gigabytes(g['free'])} free of {screen.gigabytes(g['memory'])}")
          for g in hardware["gpus"]),
        ("memory", f"{screen.gigabytes(hardware['memory_available'])} free of "
                   f"{screen.gigabytes(hardware['memory_total'])} ({hardware['memory_limit']})"),
        ("disk", f"{screen.gigabytes(facts['disk_free_bytes'])} free here"),
        ("matrix products", f"{gemm} on {rates['device']}"),
        ("computes in", facts["dtype"]["reason"]),
        ("memory copy", screen.rate(rates["bandwidth"], "B")),
        ("NF4 decoding", screen.rate(rates["dequantize"], "weights")),
        ("backend", f"{facts['backend']['name']}: {facts['backend']['reason']}"),
        ("optional packages", ", ".join(
            f"{name} {extra['version'] or 'absent (' + extra['for'] + ')'}" for name, extra in facts["extras"].items()
        )),
    ]  # fmt: skip
    out = screen.console()
    out.print(screen.table(("", ""), rows))
    for warning in facts["warnings"]:
        out.print(f"[yellow]warning:[/] {warning}")
