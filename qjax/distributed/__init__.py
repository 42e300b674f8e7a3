"""Several processes, on one machine or many, that run one model together.

    from qjax import distributed

    with distributed.initialize() as processes:
        params = qjax.load("smollm2-135m")
        if processes.lead(params):
            print(qjax.generate(params, "The capital of France is"))

Every process runs this same program. `lead` gives True in process 0 alone, which from there on does
as it likes; the others do what its engines do until it is done, and then give False.
"""

from qjax.distributed.processes import Processes, initialize

__all__ = ["Processes", "initialize"]
