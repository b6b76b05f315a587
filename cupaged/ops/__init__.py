"""The operations a Llama step is made of, twice under the same names: `ops.numpy` is the meaning, `ops.cuda` the speed."""
