"""tmp"""
from optuna.samplers import *
def cluster_sampler(name, *, workers, **kw):
    if name=="tpe": return TPESampler(constant_liar=True, multivariate=True)
    if name=="nsgaii": return NSGAIISampler(population_size=100)
    return NSGAIIISampler(population_size=100)
