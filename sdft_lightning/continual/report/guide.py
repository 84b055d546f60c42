"""How to read a report, in the report itself; docs/report.md says more."""

GUIDE: tuple[tuple[str, str], ...] = (
    (
        "New tasks",
        "Mean accuracy over the tasks of all stages, after the last stage.",
    ),
    (
        "Retained",
        "Mean over the held-out abilities, none of which is trained on. Ability by ability "
        "they are the last columns of the forgetting matrices. Figures that are no shares "
        "(perplexities, say) are left out of the mean.",
    ),
    (
        "95 % interval",
        "Over items: what these models would score on other items of the same kind. It is the "
        "recorded one (Wilson's for accuracies), that of several sets is combined from theirs "
        "(Zou and Donner 2008), and over seeds its ends are averaged, since the items are the "
        "same. It does not say what other seeds would do: SD, the standard deviation over "
        "seeds, does.",
    ),
    (
        "Average accuracy",
        "ACC = 1/T Σ R[T, j], with R[i, j] the accuracy on task j after stage i of T (Lopez- "
        "Paz and Ranzato 2017).",
    ),
    (
        "Backward transfer",
        "BWT = 1/(T − 1) Σ over j < T of R[T, j] − R[j, j]; below 0 where later stages harmed "
        "earlier tasks (Lopez-Paz and Ranzato 2017).",
    ),
    (
        "Forward transfer",
        "FWT = 1/(T − 1) Σ over j > 1 of R[j − 1, j] − b[j]; above 0 where earlier stages "
        "helped. b is the accuracy of the base model, which takes the place of the random "
        "weights in the source (Lopez-Paz and Ranzato 2017).",
    ),
    (
        "Forgetting",
        "F = 1/(T − 1) Σ over j < T of max R[l, j] − R[T, j], the best over stages 1 to T − "
        "1; below 0 for a gain (Chaudhry et al. 2018).",
    ),
    (
        "Tests over all seeds",
        "Models of all seeds answer the same items, so items are drawn, each with all its "
        "seeds: a paired bootstrap gives the interval, a sign-flip (permutation) test on the "
        "items' mean differences gives p. Counting every seed's answers as new items would "
        "make p too small.",
    ),
    (
        "McNemar's test",
        "For one seed: of the items that only one model has right, how many are the first's? "
        "Exact.",
    ),
    (
        "Holm",
        "p corrected for the number of comparisons in the table (Holm 1979): if the corrected "
        "p is at most 0.05 for some of them, the chance that any is a false alarm is at most "
        "5 %.",
    ),
)
