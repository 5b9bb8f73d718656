"""Stage report: write the page of tables, figures and heat maps, and publish every result to MLflow once."""

from __future__ import annotations

from dsd.config import Params
from flows import DATA
from flows.stages.common import Details, each, main, stage


@stage
def report(params: Params) -> dict[str, Details]:
    from dsd.report import build
    from flows.tracking import publish

    def page(name: str) -> Details:
        return {"page": str(build(params, DATA, DATA / name))}

    details = each(page, ["report"])
    publish(params, DATA)
    return details


if __name__ == "__main__":
    main(report)
