"""What a model needs, what a machine can hold and how fast it could be at most: arithmetic, before any GPU is rented.

How to read it: every line carries its formula with the numbers put in. Times are lower bounds and tokens/s upper ones,
`time of a step >= max(bytes / bandwidth, FLOP / rate)` of a GPU; what passes between GPUs, kernel launches and sampling
take further time that is not counted. No figure here is a measurement. Costs assume that the share `--utilisation` of a
bound is reached, which is a guess until it is measured: published figures of other systems on 8 GPUs lie between 4 %
(one request) and 39 % (64 requests) of these bounds.

    models.toml  machines.toml  support.toml      the data: published shapes; GPUs and offers; what Rempart runs today
    shapes -> tensors -> weights                  a config becomes tensors becomes bytes
    attention                                     cache records, and the work of attention
    placement -> bounds, offload                  what fits where, and how fast it could be
    *_report -> view                              lines with formulas; tables or JSON
"""
