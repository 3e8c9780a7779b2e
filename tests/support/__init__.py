"""What tests share, imported as ``from support import tiny``.

alike: prompts that are near-duplicates of each other, and lists of them.
browser: pages in a real browser.
by_hand: training in a few plain lines, which baselines are compared with.
cover: tables of tests of which the fast set tries a part, and the whole set all.
defenses: the table of all defences, switched off and on.
families: chat templates in the shapes of known models' own, and tokenizers for them.
file_cases: data files as people have them, and what is read of each or said of it.
folder_cases: model folders, and what is said of each or that it is used as its files say.
folders: makers of model folders of many kinds, whole, broken or of another shape.
held: training a tiny model under a prepared defence.
hub: a stand-in for the hub.
others: tiny models in another library's trainer under every defence.
own_page: the first example of ``docs/your-own.md``, files and commands.
peft_cases: adapters as PEFT saves them, and what is said of those that cannot be merged.
recorded: records of finished runs, written by hand.
recipes: digests of the code that makes what is cached; a command as well.
settings: settings with another value.
shared: what all workers of one call of pytest compute once.
spmd: what each of several processes does in the tests of them; a command as well.
suites: prompts of named suites in such records.
tiny: two-layer models, their tokenizer, and the shortest runs.
"""
