"""Loading the compiled loops before a clock runs: from disk in a fraction of a second, compiled once in some seconds."""

from __future__ import annotations

from functools import cache

from planner.cost_model import CostModel


@cache
def warm_up(sync: str = "per-layer") -> None:
    """Run the compiled searches once on a tiny batch; does nothing when called again in the same process."""
    # Imported here: numba takes half a second that readers of plans need not wait for.
    from planner.annealing import AnnealingSearch
    from planner.baselines import batch_adaptive_draft
    from planner.budget import Budget
    from planner.gang import gang_search
    from planner.problem import make_problem
    from planner.search_tables import SearchTables

    model = CostModel(
        name="warm-up",
        a1_s_per_token2=1e-9,
        a2_s_per_token=1e-6,
        b1_s=1e-3,
        communication_s=((2, 1e-7),),
        bytes_per_token=1.0,
        model_state_bytes_total=1.0,
        memory_limit_bytes=4000.0,
        unsharded_state_bytes=1.0,
    )
    lengths = [3000, *range(400, 1600, 50)]
    budget = Budget.start(0.0, node_limit=1, seed=0)
    problem = make_problem(lengths, 4, model, sync=sync)
    if sync == "per-step":
        gang_search(problem, budget, ())
        return
    tables = SearchTables.of(problem)
    search = AnnealingSearch(problem, tables, budget, 0)
    search.offer(batch_adaptive_draft(problem, tables))
    for _ in range(8):
        search.run(0.0)
