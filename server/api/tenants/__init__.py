"""Who calls, what they may, and how much of it: tenants, off unless --tenants-file is set.

- rules     the file: tenants with their weights, limits, sources; issuers of tokens; read again whenever it changes
- keys      API keys, hashed, in a document that the servers of a fleet share
- tokens    JSON web tokens of the issuers that the rules name
- callers   from a request's headers to a Caller; the layer before the routes that lets nobody else through
- access    which adapters a caller may list, call and give orders about
- bounds    how far links in adapter folders may lead
- limits    what is in flight, waits, and was used of a minute's tokens; `usage` shares the last over the fleet
- merges    which merged adapters are whose, and how many are kept
- tenancy   all of it, made once, kept up to date
"""
