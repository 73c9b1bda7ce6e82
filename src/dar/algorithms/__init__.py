"""The named bundles: which advantage, which weights, which objective, which denominator.

An algorithm turns a frozen, scored **global** batch into fixed per-row quantities (`weigh`), and then only
says what the loss of some rows is (`terms`). The trainer calls these two and does not know which algorithm it runs.
"""
