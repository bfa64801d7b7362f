"""Studies: claims that others have made about training dictionaries, tried on the tiny model.

    python -m benchmarks.sae.studies beta1 | ghost | test_time_l0

Each study is a file. It trains what it compares from several seeds, prints its table, writes every run to
`benchmarks/results/sae_studies_NAME.json` and draws its figure for `docs/dictionary_studies.md`. Where a seed is the
same, so are the initial weights and the batches: differences are taken seed by seed.
"""
