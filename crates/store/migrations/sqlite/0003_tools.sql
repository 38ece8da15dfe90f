-- Tools: what a VM got, what a task builds, and how far it is.

-- Once it runs; until then it is what the specification asks for.
alter table vms add column tools text;

-- Of `tool:build`.
alter table tasks add column tools text;
-- What is done now, and the end of what installers said.
alter table tasks add column progress text;
