"""How far from the hardware's limit: chip peaks, the FLOP ledger, the step meter and the goodput ledger.

- `chips`: what a device can do, each figure with its source; a CPU is measured.
- `flops`: FLOPs and parameters of a model, per layer and op, from its configuration alone.
- `jaxpr`: the matmul FLOPs that a JAX program executes, to hold the ledger against.
- `traffic`: bytes that a serving step must read, FLOPs of a prefill, and the share of the bandwidth that was used.
- `meter`: step times into tokens/s, MFU and HFU; a utilisation above 1 is an error.
- `goodput`: where the wall time of a run went, over all of its attempts.
- `formats`, `operations`: bytes of tensors in number formats with their scales; every op of a step, FLOPs and bytes.
- `roofline`, `reached`, `capacity`: time floors of ops and steps, their times at measured rates, what fits.
- `records`, `fleet_store`: what a run leaves behind, in one SQLite file or a folder of Parquet files of many hosts.
- `baseline`, `fleet`: median, interval and prediction limit of earlier runs; sizes, versions, reality tax, the gate.
- `command`, `commands`, `report`, `plot`: `python -m perf`; a result as tables, JSON or one page.
"""
