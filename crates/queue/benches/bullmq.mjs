// The same work with BullMQ: jobs added in batches, then taken and completed, so many at once.
// node bullmq.mjs PORT JOBS CONCURRENCY BATCH; prints two rates.
import { createRequire } from 'node:module';

const { Queue, Worker } = createRequire(process.env.BULLMQ + '/')('bullmq');
const [port, jobs, concurrency, batch] = process.argv.slice(2).map(Number);
const connection = { host: '127.0.0.1', port, maxRetriesPerRequest: null };
const queue = new Queue('bench', { connection });
await queue.waitUntilReady();

let begun = process.hrtime.bigint();
const perSecond = () => Math.round(jobs / (Number(process.hrtime.bigint() - begun) / 1e9));
for (let first = 0; first < jobs; first += batch) {
  const count = Math.min(batch, jobs - first);
  const bulk = Array.from({ length: count }, (_, i) => ({
    name: 'task', data: { task: first + i }, opts: { removeOnComplete: true },
  }));
  await queue.addBulk(bulk);
}
const added = perSecond();

let left = jobs;
const worker = new Worker('bench', async () => {}, { connection, concurrency, autorun: false });
await worker.waitUntilReady();
const done = new Promise((resolve) => worker.on('completed', () => --left || resolve()));
begun = process.hrtime.bigint();
worker.run();
await done;
console.log(JSON.stringify({ added, consumed: perSecond() }));
await worker.close();
await queue.close();
